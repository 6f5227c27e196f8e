//! Assembly and life of one guest.
