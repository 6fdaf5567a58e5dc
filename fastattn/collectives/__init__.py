"""Exchanges between ranks, and the sync policies built on them.

`exchange` wraps `torch.distributed`, and `shared_memory` on one machine, so that every failure is a
`spec.SyncError`; `exact` sums the partial results of a sync point; `prompts` sends token ids without pickle.
"""
