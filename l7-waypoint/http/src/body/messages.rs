//! Messages of gRPC in a body, counted as its bytes go by ("Length-Prefixed-Message" of gRPC over HTTP/2: a byte of flags, four of
//! length, so many bytes).

/// Bytes before each message.
const PREFIX: usize = 5;

/// See the module head.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    /// Begun, whether they have come whole or not.
    count: u64,
    prefix: [u8; PREFIX],
    /// Bytes of the prefix that have come.
    come: usize,
    /// Bytes of the present message that are still to come.
    left: usize,
}

impl Messages {
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Looks at the next bytes.
    pub(crate) fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped = self.left.min(bytes.len());
                self.left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let taken = (PREFIX - self.come).min(bytes.len());
            self.prefix[self.come..self.come + taken].copy_from_slice(&bytes[..taken]);
            self.come += taken;
            bytes = &bytes[taken..];
            if self.come == PREFIX {
                let [_, a, b, c, d] = self.prefix;
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                self.come = 0;
                self.count += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let message = |length: u8| [vec![0, 0, 0, 0, length], vec![7; usize::from(length)]].concat();
        let body = [message(3), message(0), message(200), message(1)].concat();
        for size in 1..=body.len() {
            let mut messages = Messages::default();
            body.chunks(size).for_each(|chunk| messages.pass(chunk));
            assert_eq!(messages.count(), 4, "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_no_message_yet_is_not_counted() {
        let mut messages = Messages::default();
        messages.pass(&[0, 0, 0, 0]);
        assert_eq!(messages.count(), 0);
        // The longest there can be, of which nothing comes.
        let mut messages = Messages::default();
        messages.pass(&[1, 255, 255, 255, 255, 1, 2, 3]);
        assert_eq!(messages.count(), 1);
    }
}
