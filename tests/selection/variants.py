"""Every method with some of its options: what the tests of the contract run over."""

VARIANTS = [
    "streaming:budget=0.3",
    "streaming:budget=5:sink=2",
    "longformer:budget=8:sink=2",
    "longformer:budget=0.4:sink=2:dilation=3",
    "bigbird:budget=16:block=4:first=1:recent=2",
    "bigbird:budget=0.5:block=5",
    "random:budget=0.3:sink=1:window=2",
    "random:budget=9",
    "topk:budget=0.4:sink=0:window=0",
    "topk:budget=12:gqa=max",
    "topk:budget=6:gqa=union:sink=1:window=1",
    "oracle:p=0.8",
    "oracle:p=0.8:gqa=max",
    "oracle:p=0.8:gqa=union:sink=2:window=4",
    "specattn:p=0.7",
    "specattn:p=0.7:sink=0:window=0",
    "specattn:p=0.7:map=global",
    "specattn:p=0.7:map=layer",
    "specattn:p=0.7:gqa=max",
    "specattn:p=0.7:gqa=union:map=global",
    "specattn:p=0.7:aggregate=union",
    "specattn:p=0.5:granularity=page:page=4",
    "specattn-paper:p=0.7",
]

DENSE = [
    "dense",
    "streaming:budget=1",
    "longformer:budget=1",
    "bigbird:budget=1",
    "random:budget=1",
    "topk:budget=1",
    "oracle:p=1",
    "specattn:p=1",
    "specattn-paper:p=1",
]
"""Every method with options under which it reads everything."""
