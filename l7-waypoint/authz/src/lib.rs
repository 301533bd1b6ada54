//! Authorization at L4 and L7: who may do what, and which rule said so.
//!
//! Pure: policy and attributes in, decision out. Anything that cannot be read denies.

pub mod l4;
pub mod l7;
