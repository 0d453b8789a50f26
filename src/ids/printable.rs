//! Which characters text from elsewhere may have: those that stay on the line, and in the order, in which a log shows them.

use std::fmt::{self, Write};

/// Whether a character moves what is shown after it: control characters (line breaks, the escape of a terminal's commands), the
/// line separators of Unicode, and the marks that reverse the direction of text.
pub(super) fn is_unprintable(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Whether text has no such character.
pub fn is_printable(text: &str) -> bool {
    !text.chars().any(is_unprintable)
}

/// Writes text with every such character escaped, as in `\n` and `\u{1b}`.
pub struct Escaping<W>(pub W);

impl<W: Write> Write for Escaping<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(is_unprintable) {
            match part.chars().next_back() {
                Some(last) if is_unprintable(last) => {
                    self.0.write_str(&part[..part.len() - last.len_utf8()])?;
                    write!(self.0, "{}", last.escape_default())?;
                }
                _ => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_moves_other_text_is_escaped() {
        // Broken in production: a name with a line break is a second log line, or names in other scripts cannot be read.
        let mut escaped = Escaping(String::new());
        escaped.write_str("a\nERROR b\x1b[2K\u{9b}c\u{2028}d\u{202e}\u{2067}\u{200f}e\t").unwrap();
        let expected = "a\\nERROR b\\u{1b}[2K\\u{9b}c\\u{2028}d\\u{202e}\\u{2067}\\u{200f}e\\t";
        assert_eq!(escaped.0, expected);
        assert!(is_printable(&escaped.0));
        for plain in ["", "meta-llama/Meta-Llama-3-8B@1@0@1f@half@tag%v", "Qwen 模型", "ñ \u{301}\"\\"] {
            let mut same = Escaping(String::new());
            same.write_str(plain).unwrap();
            assert!(is_printable(plain) && same.0 == plain, "{plain:?}");
        }
    }
}
