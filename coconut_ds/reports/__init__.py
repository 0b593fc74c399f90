"""Run folders as tables, figures and HTML pages; checks of the machine."""
