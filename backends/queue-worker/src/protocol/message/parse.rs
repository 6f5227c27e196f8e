//! Requests from their payloads.

use super::{
    CodecError, FrontendReq, Header, InflightInfo, LogArea, MAX_FDS, MAX_PAYLOAD, Request,
    VringAddr,
};
use crate::guest_memory::RegionInfo;

/// Bit 8 of a kick, call or err message: no fd comes with it.
pub(super) const VRING_NOFD: u64 = 1 << 8;
const VRING_INDEX_MASK: u64 = 0xff;
/// Bit 0 of SET_VRING_ADDR's flags: writes to the used ring are logged.
const VRING_F_LOG: u32 = 1;

/// Reads fields off a payload.
struct Payload<'a> {
    request: FrontendReq,
    bytes: &'a [u8],
    at: usize,
}

impl Payload<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let end = self.at + N;
        let field = self.bytes.get(self.at..end).and_then(|b| b.try_into().ok());
        self.at = end;
        field.ok_or(CodecError::ShortPayload {
            request: self.request,
            size: self.bytes.len(),
            expected: end,
        })
    }

    fn u32(&mut self) -> Result<u32, CodecError> {
        Ok(u32::from_ne_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, CodecError> {
        Ok(u64::from_ne_bytes(self.take()?))
    }

    fn region(&mut self) -> Result<RegionInfo, CodecError> {
        Ok(RegionInfo {
            gpa: self.u64()?,
            size: self.u64()?,
            uva: self.u64()?,
            file_offset: self.u64()?,
        })
    }

    fn region_after_padding(&mut self) -> Result<RegionInfo, CodecError> {
        self.u64()?;
        self.region()
    }

    fn inflight(&mut self) -> Result<InflightInfo, CodecError> {
        let bytes = self.take::<20>()?;
        InflightInfo::parse(&bytes).ok_or(CodecError::BadPayload {
            request: self.request,
        })
    }

    fn vring_state(&mut self) -> Result<(u32, u32), CodecError> {
        Ok((self.u32()?, self.u32()?))
    }

    fn vring_fd(&mut self) -> Result<(u32, bool), CodecError> {
        let value = self.u64()?;
        // Masked to 8 bits, so it fits.
        let index = (value & VRING_INDEX_MASK) as u32;
        Ok((index, value & VRING_NOFD == 0))
    }
}

impl Request {
    /// Parses the payload of a request that came with `num_fds` fds.
    pub fn parse(header: &Header, bytes: &[u8], num_fds: usize) -> Result<Request, CodecError> {
        let code = FrontendReq::try_from(header.request)
            .map_err(|_| CodecError::UnknownRequest(header.request))?;
        let mut payload = Payload {
            request: code,
            bytes,
            at: 0,
        };
        let request = parse_payload(code, &mut payload)?;
        request.check_fds(code, num_fds)?;
        Ok(request)
    }

    fn check_fds(&self, request: FrontendReq, got: usize) -> Result<(), CodecError> {
        use Request as R;
        let expected = match self {
            R::SetMemTable(regions) => regions.len(),
            R::AddMemReg(_)
            | R::SetBackendReqFd
            | R::SetInflightFd(_)
            | R::SetLogBase(_)
            | R::SetLogFd => 1,
            R::SetVringKick { has_fd, .. }
            | R::SetVringCall { has_fd, .. }
            | R::SetVringErr { has_fd, .. } => usize::from(*has_fd),
            // Some frontends send the region's fd along; it is closed unused.
            R::RemMemReg(_) if got == 1 => 1,
            R::Unsupported(_) => got,
            _ => 0,
        };
        if got == expected {
            Ok(())
        } else {
            Err(CodecError::BadFds {
                request,
                got,
                expected,
            })
        }
    }
}

fn parse_payload(code: FrontendReq, payload: &mut Payload) -> Result<Request, CodecError> {
    use FrontendReq as F;
    use Request as R;
    Ok(match code {
        F::GET_FEATURES => R::GetFeatures,
        F::SET_FEATURES => R::SetFeatures(payload.u64()?),
        F::SET_OWNER => R::SetOwner,
        F::RESET_OWNER => R::ResetOwner,
        F::GET_PROTOCOL_FEATURES => R::GetProtocolFeatures,
        F::SET_PROTOCOL_FEATURES => R::SetProtocolFeatures(payload.u64()?),
        F::GET_QUEUE_NUM => R::GetQueueNum,
        F::RESET_DEVICE => R::ResetDevice,
        F::NET_SET_MTU => R::NetSetMtu(payload.u64()?),
        F::SEND_RARP => {
            let [a, b, c, d, e, f, _, _] = payload.take::<8>()?;
            R::SendRarp([a, b, c, d, e, f])
        }
        F::SET_BACKEND_REQ_FD => R::SetBackendReqFd,
        F::GET_CONFIG | F::SET_CONFIG => parse_config(code, payload)?,
        F::SET_MEM_TABLE => parse_mem_table(payload)?,
        F::SET_LOG_BASE => {
            let (size, offset) = (payload.u64()?, payload.u64()?);
            R::SetLogBase(LogArea { size, offset })
        }
        F::SET_LOG_FD => R::SetLogFd,
        F::GET_MAX_MEM_SLOTS => R::GetMaxMemSlots,
        F::ADD_MEM_REG => R::AddMemReg(payload.region_after_padding()?),
        F::REM_MEM_REG => R::RemMemReg(payload.region_after_padding()?),
        F::GET_INFLIGHT_FD => R::GetInflightFd(payload.inflight()?),
        F::SET_INFLIGHT_FD => R::SetInflightFd(payload.inflight()?),
        F::SET_VRING_NUM
        | F::SET_VRING_ADDR
        | F::SET_VRING_BASE
        | F::GET_VRING_BASE
        | F::SET_VRING_KICK
        | F::SET_VRING_CALL
        | F::SET_VRING_ERR
        | F::SET_VRING_ENABLE => parse_vring(code, payload)?,
        other => R::Unsupported(other),
    })
}

fn parse_vring(code: FrontendReq, payload: &mut Payload) -> Result<Request, CodecError> {
    use FrontendReq as F;
    use Request as R;
    Ok(match code {
        F::SET_VRING_KICK => {
            let (index, has_fd) = payload.vring_fd()?;
            R::SetVringKick { index, has_fd }
        }
        F::SET_VRING_CALL => {
            let (index, has_fd) = payload.vring_fd()?;
            R::SetVringCall { index, has_fd }
        }
        F::SET_VRING_ERR => {
            let (index, has_fd) = payload.vring_fd()?;
            R::SetVringErr { index, has_fd }
        }
        F::SET_VRING_ADDR => {
            let (index, flags) = payload.vring_state()?;
            let addr = VringAddr {
                desc: payload.u64()?,
                used: payload.u64()?,
                avail: payload.u64()?,
            };
            let log_guest_addr = payload.u64()?;
            let log_used = (flags & VRING_F_LOG != 0).then_some(log_guest_addr);
            R::SetVringAddr {
                index,
                addr,
                log_used,
            }
        }
        _ => {
            let (index, num) = payload.vring_state()?;
            match code {
                F::SET_VRING_NUM => R::SetVringNum { index, num },
                F::SET_VRING_BASE => R::SetVringBase { index, base: num },
                F::GET_VRING_BASE => R::GetVringBase { index },
                F::SET_VRING_ENABLE => R::SetVringEnable {
                    index,
                    enable: num != 0,
                },
                other => R::Unsupported(other),
            }
        }
    })
}

fn parse_config(code: FrontendReq, payload: &mut Payload) -> Result<Request, CodecError> {
    let (offset, size, flags) = (payload.u32()?, payload.u32()?, payload.u32()?);
    let bad = CodecError::BadPayload { request: code };
    let len = usize::try_from(size).unwrap_or(usize::MAX);
    // A GET_CONFIG need not bring the room for its answer, and some frontends do not.
    if code == FrontendReq::GET_CONFIG {
        if len > MAX_PAYLOAD - 12 {
            return Err(bad);
        }
        return Ok(Request::GetConfig {
            offset,
            size,
            flags,
        });
    }
    let data = payload.bytes.get(12..).and_then(|rest| rest.get(..len));
    Ok(Request::SetConfig {
        offset,
        flags,
        data: data.ok_or(bad)?.to_vec(),
    })
}

fn parse_mem_table(payload: &mut Payload) -> Result<Request, CodecError> {
    let (count, _padding) = (payload.u32()?, payload.u32()?);
    if usize::try_from(count).unwrap_or(usize::MAX) > MAX_FDS {
        return Err(CodecError::BadPayload {
            request: FrontendReq::SET_MEM_TABLE,
        });
    }
    let regions = (0..count).map(|_| payload.region());
    Ok(Request::SetMemTable(regions.collect::<Result<_, _>>()?))
}
