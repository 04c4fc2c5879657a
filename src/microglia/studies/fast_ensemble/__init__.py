"""Fast geometric ensembling: one training in cycles, whose members are averaged."""
