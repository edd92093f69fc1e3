"""A ``Report`` for its readers: programs (``summary``), a terminal (``terminal``), and the web (``markdown``).

``words`` holds the sentences and figures that the terminal and Markdown share, so that they tell one story.
"""
