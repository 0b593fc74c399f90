"""Memory: predict it, measure it, enforce a budget."""
