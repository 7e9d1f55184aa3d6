"""The `shapes` set: pictures whose every attribute is known, made here, so that nothing is downloaded."""
