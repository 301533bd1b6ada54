//! The report of a scene while it grows.
use super::{Check, Report};

/// See the module.
#[derive(Debug)]
pub struct Record {
    report: Report,
}

impl Record {
    /// A report that shows nothing yet.
    #[must_use]
    pub fn new(number: u8, title: &str, expect: &str) -> Record {
        Record {
            report: Report {
                number,
                title: title.to_owned(),
                type_this: Vec::new(),
                expect: expect.to_owned(),
                measured: Vec::new(),
                checks: Vec::new(),
            },
        }
    }

    /// What a person would type to see the same.
    pub fn type_this(&mut self, text: impl Into<String>) {
        self.report.type_this.push(text.into());
    }

    /// A measurement nobody judges.
    pub fn measured(&mut self, text: impl Into<String>) {
        self.report.measured.push(text.into());
    }

    /// Something that had to hold.
    pub fn check(&mut self, what: &str, ok: bool, detail: impl Into<String>) {
        self.report.checks.push(Check { what: what.to_owned(), ok, detail: detail.into() });
    }

    /// A check whose numbers are also a measurement.
    pub fn check_measured(&mut self, what: &str, ok: bool, detail: impl Into<String>) {
        let detail = detail.into();
        self.measured(detail.clone());
        self.check(what, ok, detail);
    }

    /// A count against its binomial bounds.
    pub fn check_share(&mut self, what: &str, count: u64, total: u64, share: f64) {
        let (ok, text) = super::statistics::judge(what, count, total, share);
        self.check_measured(what, ok, text);
    }

    /// The report as it stands.
    #[must_use]
    pub fn report(self) -> Report {
        self.report
    }
}
