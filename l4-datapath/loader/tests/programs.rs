//! Every program loads; what the verifier counted stays within the budget file.
mod support;

use std::collections::BTreeMap;

use support::Node;

/// Program name and the most instructions the verifier may go through for it.
const BUDGET: &str = include_str!("instruction-budget.txt");

#[test]
fn every_program_loads_within_its_budget() {
    let node = Node::new("A-budget");
    let datapath = node.load(None);
    let budget: BTreeMap<&str, u32> = BUDGET
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| line.split_once(' ').expect("NAME NUMBER"))
        .map(|(name, number)| (name, number.trim().parse().expect("a number")))
        .collect();
    let counts = datapath.instruction_counts();
    for (name, count) in counts {
        println!("{name:<16} {count:>7} instructions verified");
    }
    for (name, count) in counts {
        let allowed = budget.get(name.as_str()).unwrap_or_else(|| panic!("{name} is not in instruction-budget.txt"));
        assert!(*count > 0, "{name}: the kernel reports no count");
        assert!(
            count <= allowed,
            "{name}: {count} instructions, budget {allowed}; raise it knowingly or slim the program"
        );
    }
    assert_eq!(counts.len(), budget.len(), "a program of the budget was not loaded");
}
