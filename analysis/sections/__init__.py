"""The sections of the report, in the order in which a reader decides: what to ship, how sure, at what price, why."""
