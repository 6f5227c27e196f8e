//! `berth-perf list`: what can be measured, and who is here.
#![forbid(unsafe_code)]

use std::fmt::Write;

use serde_json::{Value, json};

use crate::args::ListArgs;
use crate::peers::{PEERS, Peer};
use crate::scenario::{ALL, Entry, Need};

/// Prints it.
pub fn run(args: &ListArgs) {
    let text = match args.json {
        true => format!("{:#}\n", as_json(args)),
        false => as_text(args),
    };
    print!("{text}");
}

fn place(args: &ListArgs, peer: &Peer) -> Option<String> {
    let named = args.peer.iter().find(|(name, _)| name == peer.name);
    let path = named
        .map(|(_, path)| path.clone())
        .or_else(|| peer.program());
    path.map(|path| path.display().to_string())
}

/// "root, a KVM that runs guests".
pub fn needs(entry: &Entry) -> String {
    let texts: Vec<String> = entry
        .needs
        .iter()
        .map(|need| match need {
            Need::Root => "root".to_owned(),
            Need::Kvm => "any /dev/kvm".to_owned(),
            Need::Guest => "a KVM that runs guests, or the lab".to_owned(),
            Need::Tool { program, .. } => (*program).to_owned(),
        })
        .collect();
    texts.join(", ")
}

fn as_text(args: &ListArgs) -> String {
    let mut out = String::from("scenarios:\n");
    for entry in ALL {
        let _ = writeln!(out, "  {:<10} {}", entry.name, entry.about);
        if !entry.needs.is_empty() {
            let _ = writeln!(out, "  {:<10} needs {}", "", needs(entry));
        }
        for cell in (entry.cells)() {
            let quick = if cell.quick { "  (quick)" } else { "" };
            let _ = writeln!(out, "    {:<28} {}{quick}", cell.name, cell.title);
        }
    }
    out.push_str("peers:\n");
    for peer in PEERS {
        let place = place(args, peer);
        let text = place.unwrap_or_else(|| format!("absent: {}", peer.how));
        let _ = writeln!(out, "  {:<22} {text}", peer.name);
    }
    out
}

fn as_json(args: &ListArgs) -> Value {
    let scenarios: Vec<Value> = ALL
        .iter()
        .map(|entry| {
            let cells: Vec<Value> = (entry.cells)()
                .iter()
                .map(|cell| json!({"name": cell.name, "title": cell.title, "quick": cell.quick}))
                .collect();
            let metrics: Vec<Value> = entry
                .metrics
                .iter()
                .map(|metric| json!({"name": metric.name, "unit": metric.unit, "about": metric.about}))
                .collect();
            json!({"name": entry.name, "about": entry.about, "needs": needs(entry), "cells": cells, "metrics": metrics})
        })
        .collect();
    let peers: Vec<Value> = PEERS
        .iter()
        .map(|peer| {
            json!({"name": peer.name, "at": place(args, peer), "how": peer.how, "scenarios": peer.scenarios})
        })
        .collect();
    json!({"scenarios": scenarios, "peers": peers})
}
