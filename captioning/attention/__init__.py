"""Where the model looks: maps, figures and the page."""
