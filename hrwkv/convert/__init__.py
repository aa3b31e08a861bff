"""A teacher's directory becomes a student's: which layers stay attention, what is copied, what is new."""
