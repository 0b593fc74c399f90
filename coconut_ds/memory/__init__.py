"""Where the memory goes: predict it, measure it, hold to a budget, report it."""
