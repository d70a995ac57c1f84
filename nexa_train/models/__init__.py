"""From the name of a model to its folder (`locate.py`) and to a module with weights (`build.py`)."""
