//! PCIe: configuration space, root ports, BARs, MSI-X.
