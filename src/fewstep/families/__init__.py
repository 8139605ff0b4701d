"""One Family object for each kind of teacher."""
