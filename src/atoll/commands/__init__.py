"""The commands of `atoll`, by theme. Each is thin; what takes long to import is imported inside."""
