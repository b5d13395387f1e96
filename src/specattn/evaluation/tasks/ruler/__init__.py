"""RULER (Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?").

The 13 tasks of its appendix B, generated from their description there. The wording of the prompts is ours, so figures
compare methods with each other, not with published tables.
"""

from specattn.evaluation.tasks.ruler.task import Ruler

__all__ = ["Ruler"]
