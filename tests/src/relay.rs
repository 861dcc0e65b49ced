//! A wire that remembers: passes TCP connections on and records every byte of both directions. It can be cut, as a
//! network is: then nothing passes, and neither end is told.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A relay in front of an address.
pub struct Relay {
    /// Where it listens.
    pub address: String,
    bytes: Arc<Mutex<Vec<u8>>>,
    cut: Arc<AtomicBool>,
}

impl Relay {
    /// Starts one; it ends with the test's process.
    pub fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it has an address").to_string();
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let cut = Arc::new(AtomicBool::new(false));
        let (target, record, closed) = (target.to_string(), bytes.clone(), cut.clone());
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let clone = |stream: &TcpStream| stream.try_clone().expect("a second handle");
                let (near_again, far_again) = (clone(&near), clone(&far));
                let (one, other) = (record.clone(), record.clone());
                let (there, back) = (closed.clone(), closed.clone());
                thread::spawn(move || pass(near, far, &one, &there));
                thread::spawn(move || pass(far_again, near_again, &other, &back));
            }
        });
        Self { address, bytes, cut }
    }

    /// Cuts the wire, or mends it: what was held up then passes.
    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }

    /// All bytes so far; those of one connection and direction are together in pieces as they came.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().expect("no relay panics").clone()
    }

    /// Whether some bytes went over the wire as they are.
    pub fn saw(&self, needle: &[u8]) -> bool {
        self.bytes().windows(needle.len()).any(|window| window == needle)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, record: &Mutex<Vec<u8>>, cut: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    let wait = || {
        while cut.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(10));
        }
    };
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        wait();
        record.lock().expect("no relay panics").extend_from_slice(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    wait();
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// A header's text as HTTP/2 writes it (RFC 7541, appendix B), for the characters of a bearer credential in hex; the
/// last byte, which the next header shares, is left out.
pub fn huffman(text: &str) -> Vec<u8> {
    let code = |letter: char| match letter {
        '0' => (0b00000, 5),
        '1' => (0b00001, 5),
        '2' => (0b00010, 5),
        '3'..='9' => (0b01_1001 + letter as u32 - '3' as u32, 6),
        'a' => (0b00011, 5),
        'b' => (0b10_0011, 6),
        'c' => (0b00100, 5),
        'd' => (0b10_0100, 6),
        'e' => (0b00101, 5),
        'f' => (0b10_0101, 6),
        'r' => (0b10_1100, 6),
        'B' => (0b101_1101, 7),
        ' ' => (0b01_0100, 6),
        other => panic!("{other:?} is not in the table"),
    };
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0u32, 0);
    for letter in text.chars() {
        let (word, length) = code(letter);
        (bits, held) = (bits << length | word, held + length);
        while held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    bytes
}
