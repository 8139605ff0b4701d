"""File formats that users already have; each module reads and writes one."""
