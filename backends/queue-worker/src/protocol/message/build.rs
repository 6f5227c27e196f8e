//! Replies, and requests of our own, as bytes.

use super::{
    BackendReq, FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION_MASK, FrontendReq, HEADER_SIZE,
    InflightInfo, VERSION,
};

fn message(request: u32, flags: u32, payload: &[&[u8]]) -> Vec<u8> {
    let size: usize = payload.iter().map(|part| part.len()).sum();
    let mut bytes = Vec::with_capacity(HEADER_SIZE + size);
    bytes.extend_from_slice(&request.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    // Payloads are built here, from at most MAX_PAYLOAD bytes.
    bytes.extend_from_slice(&(size as u32).to_ne_bytes());
    for part in payload {
        bytes.extend_from_slice(part);
    }
    bytes
}

/// A reply whose payload is one number: features, counts, acknowledgements (0 is success).
pub fn reply_u64(request: u32, value: u64) -> Vec<u8> {
    message(request, VERSION | FLAG_REPLY, &[&value.to_ne_bytes()])
}

/// The reply to GET_VRING_BASE.
pub fn reply_vring_base(index: u32, base: u16) -> Vec<u8> {
    message(
        FrontendReq::GET_VRING_BASE.into(),
        VERSION | FLAG_REPLY,
        &[&index.to_ne_bytes(), &u32::from(base).to_ne_bytes()],
    )
}

/// The reply to GET_INFLIGHT_FD; the region's fd goes with it.
pub fn reply_inflight(info: &InflightInfo) -> Vec<u8> {
    message(
        FrontendReq::GET_INFLIGHT_FD.into(),
        VERSION | FLAG_REPLY,
        &[&info.to_bytes()],
    )
}

/// The reply to GET_CONFIG. Empty `data` tells the frontend that the read failed.
pub fn reply_config(offset: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    message(
        FrontendReq::GET_CONFIG.into(),
        VERSION | FLAG_REPLY,
        &[
            &offset.to_ne_bytes(),
            &(data.len() as u32).to_ne_bytes(),
            &flags.to_ne_bytes(),
            data,
        ],
    )
}

/// A request from us to the frontend, without payload, that wants no reply.
pub fn backend_request(request: BackendReq) -> Vec<u8> {
    message(request.into(), VERSION, &[])
}

/// A request as a frontend sends it; the fake frontend's side of the codec.
pub fn frontend_request(request: u32, need_reply: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if need_reply { FLAG_NEED_REPLY } else { 0 };
    message(request, flags, &[payload])
}

/// Whether `flags` are those of a reply; the fake frontend's side of the codec.
pub fn is_reply(flags: u32) -> bool {
    flags & FLAG_VERSION_MASK == VERSION && flags & FLAG_REPLY != 0
}
