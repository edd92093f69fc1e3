"""A ``Report`` for programs (``summary``), terminals (``terminal``), pull requests (``markdown``), browsers (``html``).

``words`` holds the sentences and figures that they share, so that they tell one story. The page's pictures are what
``figures`` takes from a report, drawn by ``charts``.
"""
