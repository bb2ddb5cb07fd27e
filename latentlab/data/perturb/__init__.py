"""Copies of word problems with other numbers: the same words and steps, the chain recomputed.

Read copies.py first, which draws new numbers; template.py traces where each number of a chain comes
from, with equations.py (exact arithmetic) and wording.py (what the words of a question say about
its numbers).
"""

from latentlab.data.perturb.copies import perturb as perturb
from latentlab.data.perturb.copies import perturbed as perturbed
from latentlab.data.perturb.equations import parse_step as parse_step
from latentlab.data.perturb.template import Template as Template
from latentlab.data.perturb.template import trace as trace
from latentlab.data.perturb.wording import skeleton as skeleton
