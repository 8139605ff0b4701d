"""Jobs that turn data and teachers into what training reads."""
