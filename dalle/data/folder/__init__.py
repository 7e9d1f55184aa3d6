"""Your own pictures to shards: folders of pictures with `.txt` files beside them, tables, parquet files."""
