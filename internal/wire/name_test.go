package wire

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestName(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string]string{
		`null`: "", `""`: "", `"lobby"`: "lobby", `"\u00e9"`: "é", `"e\u0301"`: "e\u0301", `"\ud83d\ude00"`: "😀", `"\uD83D\uDE00😀"`: "😀😀",
		`"\ufffd"`: "\ufffd", `"\\ud800"`: `\ud800`, `"\"\\\\\ud83d\ude00"`: `"\\😀`, `"\ue000\ud7ff"`: "\ue000\ud7ff",
	} {
		var n Name
		require.NoError(t, json.Unmarshal([]byte(raw), &n), raw)
		assert.Equal(t, want, string(n), raw)
	}
	for _, raw := range []string{
		`"\ud800"`, `"\udc00"`, `"a\uDBFF"`, `"\ud800\ud800\udc00"`, `"\ud800x\udc00"`, `"\ud800\\udc00"`, `"\ud83d\ude00\ude00"`, `"\\\\\udfff"`,
	} {
		var n Name
		require.ErrorIs(t, json.Unmarshal([]byte(raw), &n), errHalfPair, raw)
	}
	for _, raw := range []string{`1`, `{}`, `[]`, `true`} {
		var n Name
		require.Error(t, json.Unmarshal([]byte(raw), &n), raw)
	}
}

// FuzzName compares names with those of JavaScript: two texts of a client never become
// one name.
func FuzzName(f *testing.F) {
	for _, s := range []string{`"\ud800"`, `"\ud83d\ude00"`, `"\\ud800\udc00"`, `"a\u0000"`, `null`, `"\udc00\ud800"`, `"\ufffd�"`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var n Name
		err := json.Unmarshal(raw, &n)
		if !utf8.Valid(raw) || !json.Valid(raw) {
			return
		}
		var text string
		if json.Unmarshal(raw, &text) != nil {
			require.Error(t, err)
			return
		}
		if text == "" { // or null
			require.NoError(t, err)
			return
		}
		units := codeUnits(strings.TrimSpace(string(raw)))
		whole := string(utf16.Decode(units))
		lossless := assert.ObjectsAreEqual(units, utf16.Encode([]rune(whole)))
		require.Equal(t, lossless, err == nil, "%q", raw)
		if lossless {
			require.Equal(t, whole, string(n))
		}
	})
}

// codeUnits decodes a valid JSON string into UTF-16, one unit after the other.
func codeUnits(quoted string) []uint16 {
	units := []uint16{}
	for s := quoted[1 : len(quoted)-1]; s != ""; {
		size := 2
		switch {
		case s[0] != '\\':
			r, n := utf8.DecodeRuneInString(s)
			units, size = utf16.AppendRune(units, r), n
		case s[1] == 'u':
			size = 6
			var v uint16
			for _, c := range []byte(strings.ToLower(s[2:6])) {
				v = v<<4 + uint16(strings.IndexByte("0123456789abcdef", c))
			}
			units = append(units, v)
		default:
			units = append(units, uint16(map[byte]byte{'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}[s[1]]))
			if units[len(units)-1] == 0 {
				units[len(units)-1] = uint16(s[1])
			}
		}
		s = s[size:]
	}
	return units
}
