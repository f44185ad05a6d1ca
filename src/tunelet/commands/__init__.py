"""The verbs, grouped: what each takes, and which part of tunelet does it. No work is done here.

Modules import torch and transformers inside the verbs only, so that `tunelet --help` answers at once.
"""
