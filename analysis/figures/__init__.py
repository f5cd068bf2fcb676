"""The figures of the report, a file for each family, and what they share (`draw`)."""
