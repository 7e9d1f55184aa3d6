"""How losses become steps under each backend: one process, DDP, FSDP2, ZeRO; and how a launcher asks for one."""
