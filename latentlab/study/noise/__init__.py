"""When does a mask help? The study of noise arms over many bases: `latentlab sweep --plan noise`.

Read plan.py first, then unit.py (what one process does), stages.py (which units there are) and
findings.py (what the rows say).
"""
