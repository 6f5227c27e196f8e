//! docs/threat-model.md says which system calls each thread may make: this holds it to what the filters allow.

use berth_vmm::sandbox::ThreadKind;
use berth_vmm::sandbox::syscalls::{Syscall, allowed, common};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/threat-model.md");
const BEGIN: &str = "<!-- system calls: begin -->\n";
const END: &str = "<!-- system calls: end -->";

fn list(calls: &[Syscall]) -> String {
    let mut names: Vec<_> = calls.iter().map(|call| format!("`{call}`")).collect();
    names.sort();
    names.dedup();
    names.join(", ")
}

fn table() -> String {
    let every = common();
    let mut text = String::from("| thread | started by | system calls |\n|---|---|---|\n");
    text += &format!("| every thread | | {} |\n", list(&every));
    for kind in ThreadKind::ALL {
        let mut own = allowed(kind, true);
        own.retain(|call| !every.contains(call));
        let parent = match kind {
            ThreadKind::Main => "",
            _ => kind.parent().name(),
        };
        let own = match own.is_empty() {
            true => "no others".to_owned(),
            false => list(&own),
        };
        text += &format!("| `{}` | {parent} | {own} |\n", kind.name());
    }
    text
}

#[test]
fn the_documents_lists_are_the_filters() {
    let text = std::fs::read_to_string(DOCUMENT).unwrap();
    let (_, rest) = text.split_once(BEGIN).expect("no mark of the begin");
    let (documented, _) = rest.split_once(END).expect("no mark of the end");
    let table = table();
    assert!(
        documented == table,
        "docs/threat-model.md is to say:\n{BEGIN}{table}{END}"
    );
}
