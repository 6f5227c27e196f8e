//! Wire types of the berth-vmm REST API, v1
