"""Run folders and inspections as tables, figures and HTML pages."""
