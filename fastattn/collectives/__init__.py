"""Exchanges between ranks, and the sync policies built on them.

`exchange` wraps `torch.distributed` so that every failure is a `spec.SyncError`; `exact` sums the partial
results of a sync point; `prompts` sends token ids without pickle.
"""
