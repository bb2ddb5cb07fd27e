"""The course as a site: notebooks, docs and results behind one first page. Read build.py first."""
