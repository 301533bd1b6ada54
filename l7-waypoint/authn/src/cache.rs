//! Tokens verified before. One per worker, so without a lock.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

/// A token that verified.
#[derive(Debug)]
pub(crate) struct Verified {
    /// Decoded payload, after normalisation by its provider.
    pub(crate) claims: Arc<Value>,
    pub(crate) header: Arc<Value>,
    /// The payload as it was in the token.
    pub(crate) payload: Arc<str>,
    pub(crate) expires: Option<u64>,
    pub(crate) not_before: Option<u64>,
}

struct Entry {
    token: Box<str>,
    keys: u64,
    verified: Arc<Verified>,
}

/// Two generations: what is asked for moves to the young one; when that is full it becomes the old one and the old
/// one is forgotten. Bounded, close to least recently used, constant time. Only successes are kept, so nobody can
/// flush it with rubbish.
pub struct TokenCache {
    young: HashMap<u64, Entry>,
    old: HashMap<u64, Entry>,
    capacity: usize,
}

impl Default for TokenCache {
    /// Room for 1000 tokens.
    fn default() -> Self {
        Self::new(1000)
    }
}

impl TokenCache {
    /// Room for `capacity` tokens.
    pub fn new(capacity: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), capacity: (capacity / 2).max(1) }
    }

    /// The whole token is compared, so that a collision of hashes can't vouch for another token.
    pub(crate) fn get(&mut self, provider: u64, keys: u64, token: &str) -> Option<Arc<Verified>> {
        let key = key(provider, token);
        let fits = |entry: &&Entry| entry.keys == keys && *entry.token == *token;
        if let Some(entry) = self.young.get(&key).filter(fits) {
            return Some(entry.verified.clone());
        }
        self.old.get(&key).filter(fits)?;
        let entry = self.old.remove(&key)?;
        let verified = entry.verified.clone();
        self.insert(key, entry);
        Some(verified)
    }

    pub(crate) fn put(&mut self, provider: u64, keys: u64, token: &str, verified: Arc<Verified>) {
        self.insert(key(provider, token), Entry { token: token.into(), keys, verified });
    }

    fn insert(&mut self, key: u64, entry: Entry) {
        if self.young.len() >= self.capacity {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, entry);
    }
}

fn key(provider: u64, token: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(token.as_bytes(), provider)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified() -> Arc<Verified> {
        Arc::new(Verified {
            claims: Arc::default(),
            header: Arc::default(),
            payload: "".into(),
            expires: None,
            not_before: None,
        })
    }

    #[test]
    fn stays_bounded_and_keeps_what_is_used() {
        let mut cache = TokenCache::new(100);
        for number in 0..1000 {
            cache.put(1, 1, &number.to_string(), verified());
            assert!(cache.get(1, 1, "0").is_some(), "the busy token was lost at {number}");
        }
        assert!(cache.young.len() + cache.old.len() <= 100);
        assert!(cache.get(1, 1, "5").is_none());
        assert!(cache.get(2, 1, "0").is_none(), "another provider");
        assert!(cache.get(1, 2, "0").is_none(), "other keys");
    }
}
