package redact

import (
	"strings"
	"unicode"

	"github.com/meshpresence/mesh/internal/limit"
)

// mostText limits the bytes of a client's text in a log line.
const mostText = 100

// Printable shortens the text of a client for a log line and replaces characters that do
// not print.
func Printable(text string) string {
	cut := len(text) > mostText
	if cut {
		text = text[:mostText]
	}
	text = onlyPrint(text, '?')
	if cut {
		text += "…"
	}
	return text
}

// OneLine is Printable for an error of the app or of a library, which may be longer. It
// replaces with spaces.
func OneLine(text string) string {
	return limit.Shorten(onlyPrint(text, ' '))
}

// onlyPrint replaces each character that does not print with instead.
func onlyPrint(text string, instead rune) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return instead
		}
		return r
	}, text)
}
