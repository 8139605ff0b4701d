"""Distribution matching distillation: roles, conditions and loss terms."""
