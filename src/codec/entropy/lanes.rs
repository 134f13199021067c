//! Up to 32 lanes over one sequence of words, both directions.
//!
//! Encoding is constriction's, with one word buffer shared by all lanes. Decoding is spelled out, because this loop is what
//! every engine must repeat; tests hold it against constriction's own decoder.

use std::cell::RefCell;

use constriction::backends::WriteWords;
use constriction::stream::Encode;
use constriction::stream::stack::AnsCoder;

use super::coding_table::{CodingTable, PRECISION};
use crate::format::strip::LANES;

/// Where lanes start encoding and must end decoding.
pub const STATE_LOW: u32 = 1 << 16;

/// A strip's lanes do not decode to an end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// More words were needed than the strip has.
    #[error("the lanes need more than the {words} words there are")]
    WordsMissing {
        /// Words of the strip.
        words: usize,
    },
    /// Words were left over.
    #[error("the lanes used {used} of {words} words")]
    WordsLeft {
        /// Words read.
        used: usize,
        /// Words of the strip.
        words: usize,
    },
    /// A lane did not return to where encoding started.
    #[error("lane {lane} ended in state {state}, expected {STATE_LOW}")]
    EndState {
        /// Which one.
        lane: usize,
        /// Its last state.
        state: u32,
    },
}

/// The one word buffer that all lanes of a strip write to.
struct SharedWords<'a>(&'a RefCell<Vec<u16>>);

impl WriteWords<u16> for SharedWords<'_> {
    type WriteError = std::convert::Infallible;

    #[inline]
    fn write(&mut self, word: u16) -> Result<(), Self::WriteError> {
        self.0.borrow_mut().push(word);
        Ok(())
    }
}

/// Encodes the symbols of one strip. `positions` are table positions, run after run of `run_elements`; `table_of` gives the
/// table of a symbol, by its run and its index in the strip. Returns the states of the lanes and the words, both in reading order.
///
/// Panics if a position is not in its table: the encoder has put it there.
pub fn encode_lanes<'t>(
    positions: &[u8],
    run_elements: usize,
    lanes: usize,
    table_of: impl Fn(usize, usize) -> &'t CodingTable,
) -> (Vec<u32>, Vec<u16>) {
    let words = RefCell::new(Vec::with_capacity(positions.len() / 2));
    let coder = |_| AnsCoder::<u16, u32, SharedWords<'_>>::from_raw_parts(SharedWords(&words), STATE_LOW);
    let mut coders: Vec<_> = (0..lanes).map(coder).collect();
    // A stack: what is encoded last is decoded first.
    for (run, symbols) in positions.chunks(run_elements).enumerate().rev() {
        for (round, symbols) in symbols.chunks(lanes).enumerate().rev() {
            let first = run * run_elements + round * lanes;
            for lane in (0..symbols.len()).rev() {
                let table = table_of(run, first + lane);
                coders[lane].encode_symbol(symbols[lane], table).expect("every position is in its table");
            }
        }
    }
    let states = coders.into_iter().map(|lane| lane.into_raw_parts().1).collect();
    let mut words = words.into_inner();
    words.reverse();
    (states, words)
}

/// The lanes of one strip being decoded.
#[derive(Clone, Debug)]
pub struct LaneReader<'a> {
    states: [u32; LANES],
    lanes: usize,
    words: &'a [[u8; 2]],
    next_word: usize,
}

impl<'a> LaneReader<'a> {
    /// Starts from the states of a strip's lanes, four bytes each, and its words.
    pub fn new(states: &[u8], words: &'a [u8]) -> Self {
        let stored = states.as_chunks().0;
        let mut states = [STATE_LOW; LANES];
        for (state, &bytes) in states.iter_mut().zip(stored) {
            *state = u32::from_le_bytes(bytes);
        }
        Self { states, lanes: stored.len(), words: words.as_chunks().0, next_word: 0 }
    }

    /// The lane of a symbol by its index in its run.
    #[inline]
    pub fn lane_of(&self, index: usize) -> usize {
        index % self.lanes
    }

    /// Decodes the next symbol of a lane: its table position. Corrupt data give some position of the table.
    #[inline]
    pub fn decode_symbol(&mut self, lane: usize, table: &CodingTable) -> u8 {
        let state = &mut self.states[lane];
        let slot = *state & ((1 << PRECISION) - 1);
        let position = table.position_of_slot(slot);
        let (first_slot, slots) = table.interval(position);
        // No overflow: at most (2^20 - 1) * 4095 + 4095.
        *state = (*state >> PRECISION) * slots + slot - first_slot;
        if *state < STATE_LOW {
            let word = self.words.get(self.next_word).map_or(0, |&word| u16::from_le_bytes(word));
            *state = *state << 16 | u32::from(word);
            self.next_word += 1;
        }
        position
    }

    /// Checks that every word was used and every lane came home.
    pub fn finish(&self) -> Result<(), LaneError> {
        let words = self.words.len();
        if self.next_word > words {
            return Err(LaneError::WordsMissing { words });
        }
        if self.next_word < words {
            return Err(LaneError::WordsLeft { used: self.next_word, words });
        }
        match self.states.iter().position(|&state| state != STATE_LOW) {
            Some(lane) => Err(LaneError::EndState { lane, state: self.states[lane] }),
            None => Ok(()),
        }
    }
}

/// Decodes the positions of one run. On corrupt data the positions are some positions of the table, missing words read as
/// zero, and [`LaneReader::finish`] tells.
pub fn decode_run(reader: &mut LaneReader<'_>, table: &CodingTable, positions: &mut [u8]) {
    for (index, position) in positions.iter_mut().enumerate() {
        *position = reader.decode_symbol(reader.lane_of(index), table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::table::Table;
    use constriction::backends::ReadWords;
    use constriction::stream::Decode;
    use constriction::{Stack, UnwrapInfallible};
    use proptest::prelude::*;
    use std::convert::Infallible;

    fn tables() -> Vec<CodingTable> {
        [(vec![0, 1, -1, 2], vec![3000, 500, 500, 96]), (vec![5, 7], vec![4095, 1]), (vec![0, 1, 2], vec![1, 4000, 95])]
            .map(|(codes, frequencies)| CodingTable::new(Table { codes, frequencies, point_offsets: vec![] }))
            .into()
    }

    /// Words in reading order, shared by constriction's decoders as the strip's lanes share them.
    struct SharedReader<'a>(&'a RefCell<std::vec::IntoIter<u16>>);

    impl ReadWords<u16, Stack> for SharedReader<'_> {
        type ReadError = Infallible;

        fn read(&mut self) -> Result<Option<u16>, Infallible> {
            Ok(self.0.borrow_mut().next())
        }
    }

    fn state_bytes(states: &[u32]) -> Vec<u8> {
        states.iter().flat_map(|state| state.to_le_bytes()).collect()
    }

    #[test]
    fn the_example_of_the_specification_holds() {
        let table = Table { codes: vec![0, -1, 1], frequencies: vec![2048, 1024, 1024], point_offsets: vec![] };
        let table = CodingTable::new(table);
        let (states, words) = encode_lanes(&[0, 1, 2], 3, LANES, |_, _| &table);
        assert_eq!(states[..4], [0x0002_0000, 0x0004_0800, 0x0004_0c00, 0x0001_0000]);
        assert!(words.is_empty());

        let mut states = [STATE_LOW; LANES];
        states[5] = 70_000;
        let words = 4660_u16.to_le_bytes();
        let mut reader = LaneReader::new(&state_bytes(&states), &words);
        assert_eq!(reader.decode_symbol(5, &table), 0);
        assert_eq!(reader.finish(), Err(LaneError::EndState { lane: 5, state: 35_184 * 65_536 + 4660 }));
    }

    proptest! {
        #[test]
        fn decoding_gives_the_encoded_symbols_and_constriction_agrees(
            draws in prop::collection::vec(any::<u8>(), 1..3000),
            run_elements in 1_usize..200,
            lane_bits in 0..6,
        ) {
            let tables = tables();
            let table_of_run = |run: usize| &tables[run % tables.len()];
            let positions: Vec<u8> = draws
                .iter()
                .enumerate()
                .map(|(index, &draw)| draw % table_of_run(index / run_elements).positions() as u8)
                .collect();
            let (states, words) = encode_lanes(&positions, run_elements, 1_usize << lane_bits, |run, _| table_of_run(run));

            let word_bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut reader = LaneReader::new(&state_bytes(&states), &word_bytes);
            let mut decoded = vec![0; positions.len()];
            for (run, symbols) in decoded.chunks_mut(run_elements).enumerate() {
                decode_run(&mut reader, table_of_run(run), symbols);
            }
            prop_assert_eq!(&decoded, &positions);
            prop_assert_eq!(reader.finish(), Ok(()));

            let shared = RefCell::new(words.into_iter());
            let coder = |state| AnsCoder::<u16, u32, SharedReader<'_>>::from_raw_parts(SharedReader(&shared), state);
            let mut lanes: Vec<_> = states.into_iter().map(coder).collect();
            let count = lanes.len();
            for (index, &position) in positions.iter().enumerate() {
                let (run, within) = (index / run_elements, index % run_elements);
                let symbol = lanes[within % count].decode_symbol(table_of_run(run)).unwrap_infallible();
                prop_assert_eq!(symbol, position);
            }
        }

        #[test]
        fn corrupt_lanes_end_in_an_error_or_in_symbols_never_in_a_panic(
            lane_bits in 0..6,
            states: [[u8; 32]; 4],
            words in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let mut reader = LaneReader::new(&states.concat()[..4_usize << lane_bits], &words);
            let mut positions = [0; 500];
            for table in &tables() {
                decode_run(&mut reader, table, &mut positions);
                prop_assert!(positions.iter().all(|&position| usize::from(position) < table.positions()));
            }
            let _ = reader.finish();
        }
    }
}
