"""Which model gets which share of a device, when, and in which batches. Knows no TVM, no device."""
