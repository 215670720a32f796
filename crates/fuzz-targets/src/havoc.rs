//! Inputs from a seed, where there is no libFuzzer: those of a corpus, changed at random, and some of pure chance.

use urus_sim::rng::Rng;

/// Gives input number `number` of a seed: the same for everyone who has the same corpus.
#[must_use]
pub fn generate(seed: u64, number: u64, corpus: &[Vec<u8>], most_bytes: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed ^ urus_sim::rng::mix(number));
    let mut bytes = if corpus.is_empty() || rng.chance(24) {
        let len = rng.index(most_bytes.min(128));
        (0..len).map(|_| byte(&mut rng)).collect()
    } else {
        corpus[rng.index(corpus.len())].clone()
    };
    for _ in 0..1 + rng.index(6) {
        change(&mut bytes, &mut rng, corpus);
    }
    bytes.truncate(most_bytes);
    bytes
}

fn byte(rng: &mut Rng) -> u8 {
    const OFTEN: [u8; 8] = [0, 1, 2, 0x7f, 0x80, 0xfe, 0xff, 0x10];
    if rng.chance(64) {
        OFTEN[rng.index(OFTEN.len())]
    } else {
        rng.next_u64().to_le_bytes()[0]
    }
}

fn change(bytes: &mut Vec<u8>, rng: &mut Rng, corpus: &[Vec<u8>]) {
    let len = bytes.len();
    let at = rng.index(len + 1);
    let few = 1 + rng.index(8);
    match rng.index(9) {
        0 if at < len => bytes[at] ^= 1 << rng.index(8),
        1 | 2 if at < len => bytes[at] = byte(rng),
        3 if at < len => {
            let step = i8::try_from(rng.index(17)).expect("small") - 8;
            bytes[at] = bytes[at].wrapping_add_signed(step);
        }
        4 => {
            let more: Vec<u8> = (0..few).map(|_| byte(rng)).collect();
            bytes.splice(at..at, more);
        }
        5 => {
            bytes.drain(at..len.min(at + few));
        }
        6 => {
            let again = bytes[at..len.min(at + few * 2)].to_vec();
            let to = rng.index(len + 1);
            bytes.splice(to..to, again);
        }
        7 => bytes.truncate(at),
        _ => {
            if let Some(other) = corpus.get(rng.index(corpus.len().max(1))) {
                let from = rng.index(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A seed and a number name an input; others give others, none too long.
    #[test]
    fn inputs_come_from_their_number() {
        let corpus = [vec![1; 40], vec![2; 7]];
        let inputs: Vec<_> = (0..200).map(|n| generate(3, n, &corpus, 64)).collect();
        let again: Vec<_> = (0..200).map(|n| generate(3, n, &corpus, 64)).collect();
        assert_eq!(inputs, again);
        let mut different = inputs.clone();
        different.sort();
        different.dedup();
        assert!(different.len() > 150, "{}", different.len());
        assert!(inputs.iter().all(|input| input.len() <= 64));
    }
}
