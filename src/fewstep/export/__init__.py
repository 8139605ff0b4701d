"""Writing finished generators in the forms that other tools load."""
