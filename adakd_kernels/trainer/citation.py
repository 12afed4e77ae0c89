"""How to cite the method."""

__all__ = ["CITATION", "PAPER_ID", "PAPER_TITLE"]

PAPER_TITLE = "LLM-Oriented Token-Adaptive Knowledge Distillation"
PAPER_ID = "2510.11615"
"""On arXiv."""
CITATION = f"""\
@article{{xie2025adakd,
  title   = {{{PAPER_TITLE}}},
  author  = {{Xurong Xie and Zhucun Xue and Jiafu Wu and Jian Li and Yabiao Wang and Xiaobin Hu and Yong Liu and
             Jiangning Zhang}},
  journal = {{arXiv preprint arXiv:{PAPER_ID}}},
  year    = {{2025}}
}}
"""
