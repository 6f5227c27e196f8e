use super::parse::VRING_NOFD;
use super::*;

fn parse(code: FrontendReq, payload: &[u8], fds: usize) -> Result<Request, CodecError> {
    let bytes = frontend_request(code.into(), false, payload);
    let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap())?;
    assert_eq!(header.size, payload.len());
    Request::parse(&header, &bytes[HEADER_SIZE..], fds)
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

#[test]
fn header_with_foreign_version_reply_or_reserved_bits_is_refused() {
    for flags in [0u32, 2, 3, 1 | FLAG_REPLY, 1 | 1 << 4, 1 | 1 << 31] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        assert!(Header::parse(&bytes).is_err(), "flags {flags:#x}");
    }
    let mut bytes = [0; HEADER_SIZE];
    bytes[4..8].copy_from_slice(&(VERSION | FLAG_NEED_REPLY).to_ne_bytes());
    assert!(Header::parse(&bytes).unwrap().need_reply());
}

#[test]
fn header_with_absurd_size_is_refused() {
    let mut bytes = [0; HEADER_SIZE];
    bytes[4..8].copy_from_slice(&VERSION.to_ne_bytes());
    bytes[8..].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_ne_bytes());
    assert!(matches!(
        Header::parse(&bytes),
        Err(CodecError::TooLarge { .. })
    ));
}

#[test]
fn fds_must_match_the_request() {
    assert!(parse(FrontendReq::SET_FEATURES, &words(&[1]), 0).is_ok());
    assert!(parse(FrontendReq::SET_FEATURES, &words(&[1]), 1).is_err());
    assert!(parse(FrontendReq::SET_VRING_KICK, &words(&[3]), 0).is_err());
    assert_eq!(
        parse(FrontendReq::SET_VRING_CALL, &words(&[3 | VRING_NOFD]), 0),
        Ok(Request::SetVringCall {
            index: 3,
            has_fd: false
        })
    );
}

#[test]
fn dirty_log_needs_its_area_and_one_fd() {
    let area = words(&[0x2000, 0x1000]);
    let request = parse(FrontendReq::SET_LOG_BASE, &area, 1);
    let expected = LogArea {
        size: 0x2000,
        offset: 0x1000,
    };
    assert_eq!(request, Ok(Request::SetLogBase(expected)));
    assert!(parse(FrontendReq::SET_LOG_BASE, &area, 0).is_err());
    assert!(parse(FrontendReq::SET_LOG_BASE, &area, 2).is_err());
    assert!(parse(FrontendReq::SET_LOG_BASE, &area[..8], 1).is_err());
    assert_eq!(
        parse(FrontendReq::SET_LOG_FD, &[], 1),
        Ok(Request::SetLogFd)
    );
    assert!(parse(FrontendReq::SET_LOG_FD, &[], 0).is_err());
}

#[test]
fn used_ring_is_logged_where_the_flag_says_so() {
    for (flags, expected) in [(0, None), (1, Some(0x5000)), (2, None), (3, Some(0x5000))] {
        let payload = words(&[flags << 32, 0x1000, 0x3000, 0x2000, 0x5000]);
        let request = parse(FrontendReq::SET_VRING_ADDR, &payload, 0).unwrap();
        let Request::SetVringAddr { log_used, .. } = request else {
            panic!("{request:?}")
        };
        assert_eq!(log_used, expected, "flags {flags}");
    }
    let short = words(&[0, 0x1000, 0x3000, 0x2000]);
    assert!(parse(FrontendReq::SET_VRING_ADDR, &short, 0).is_err());
}

#[test]
fn memory_table_needs_a_region_and_an_fd_for_each_that_it_counts() {
    let two = words(&[2, 0, 0x1000, 0x7000, 0, 0x1000, 0x1000, 0x8000, 0x1000]);
    let table = parse(FrontendReq::SET_MEM_TABLE, &two, 2).unwrap();
    let Request::SetMemTable(regions) = table else {
        panic!("{table:?}")
    };
    assert_eq!(regions[1].file_offset, 0x1000);
    assert!(parse(FrontendReq::SET_MEM_TABLE, &two, 1).is_err());
    assert!(parse(FrontendReq::SET_MEM_TABLE, &two[..60], 2).is_err());
    assert!(parse(FrontendReq::SET_MEM_TABLE, &words(&[33]), 0).is_err());
}

#[test]
fn config_reads_take_any_size_and_writes_need_their_data() {
    let head = |size: u32| {
        [0u32, size, 0]
            .iter()
            .flat_map(|v| v.to_ne_bytes())
            .collect::<Vec<_>>()
    };
    for size in [1, 57, 60, 256] {
        let request = parse(FrontendReq::GET_CONFIG, &head(size), 0).unwrap();
        assert!(matches!(request, Request::GetConfig { size: s, .. } if s == size));
    }
    assert!(parse(FrontendReq::GET_CONFIG, &head(u32::MAX), 0).is_err());
    let mut write = head(2);
    write.push(7);
    assert!(parse(FrontendReq::SET_CONFIG, &write, 0).is_err());
    write.push(8);
    assert!(parse(FrontendReq::SET_CONFIG, &write, 0).is_ok());
}

#[test]
fn requests_that_are_not_offered_are_told_apart_from_unknown_ones() {
    assert_eq!(
        parse(FrontendReq::POSTCOPY_ADVISE, &[], 0),
        Ok(Request::Unsupported(FrontendReq::POSTCOPY_ADVISE))
    );
    let bytes = frontend_request(4711, false, &[]);
    let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap()).unwrap();
    assert_eq!(
        Request::parse(&header, &[], 0),
        Err(CodecError::UnknownRequest(4711))
    );
}
