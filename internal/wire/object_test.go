package wire

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPatch(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, current, patch, want string
	}{
		{"nothing there", ``, `{"a":1}`, `{"a":1}`},
		{"nothing there, nothing set", ``, `{"a":null}`, ``},
		{"keys keep their order", `{"a":1,"b":2,"c":3}`, `{"d":4,"b":5}`, `{"a":1,"b":5,"c":3,"d":4}`},
		{"null removes", `{"a":1,"b":2}`, `{"a":null}`, `{"b":2}`},
		{"null removes nothing", `{"a":1}`, `{"b":null}`, `{"a":1}`},
		{"nothing is left", `{"a":1}`, `{"a":null}`, ``},
		{"nested null is a value", `{"a":1}`, `{"b":{"c":null},"d":[null]}`, `{"a":1,"b":{"c":null},"d":[null]}`},
		{"objects are replaced", `{"a":{"x":1}}`, `{"a":{"y":2}}`, `{"a":{"y":2}}`},
		{"values keep their bytes", `{"a":12345678901234567890.10}`, `{"b":1e400,"c":"\u0061\/"}`,
			`{"a":12345678901234567890.10,"b":1e400,"c":"\u0061\/"}`},
		{"the same name in another spelling", `{"a":1}`, `{"\u0061":2}`, `{"a":2}`},
		{"names given twice", `{"a":1,"b":2,"a":3}`, `{"c":1,"c":2}`, `{"a":3,"b":2,"c":2}`},
		{"null last", `{"a":1,"b":1}`, `{"a":2,"a":null}`, `{"b":1}`},
		{"null first", `{"a":1,"b":1}`, `{"a":null,"a":2}`, `{"a":2,"b":1}`},
		{"empty patch", `{"a":1}`, `{}`, `{"a":1}`},
		{"empty name", `{"":1}`, `{"":2}`, `{"":2}`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var current []byte
			if test.current != "" {
				current = []byte(test.current)
			}
			o := ParseObject(current)
			o.Patch(ParseObject([]byte(test.patch)))
			assert.Equal(t, test.want, string(o.JSON()))
			assert.Equal(t, test.current, string(current), "not changed")
			assert.Len(t, slices.Collect(o.Names()), o.Len())
		})
	}
}

func TestPatchNamesItsKeys(t *testing.T) {
	t.Parallel()
	o := ParseObject([]byte(`{"a":1,"b":2,"c":3}`))
	assert.Equal(t, map[string]bool{"a": true, "b": false, "x": false, "d": true},
		o.Patch(ParseObject([]byte(`{"a":{"b":null},"b":null,"x":null,"d":0}`))))
	o.Remove("c")
	o.Remove("c")
	o.Remove("nothing")
	assert.Equal(t, []string{"a", "d"}, slices.Collect(o.Names()))
	assert.Equal(t, 2, o.Len())
	for name := range o.Names() {
		o.Remove(name)
	}
	assert.Nil(t, o.JSON())
}

// FuzzPatch compares patches with maps of encoding/json.
func FuzzPatch(f *testing.F) {
	f.Add([]byte(`{"a":1,"b":{"c":null}}`), []byte(`{"a":null,"d":[]}`))
	f.Add([]byte(` { "a" : 1 , "a" : 2 } `), []byte(`{"\u0061":3,"":null}`))
	f.Fuzz(func(t *testing.T, current, patch []byte) {
		var want, change map[string]json.RawMessage
		if CheckValue(current) != nil || CheckValue(patch) != nil || !IsObject(current) || !IsObject(patch) {
			return
		}
		require.NoError(t, json.Unmarshal(current, &want))
		require.NoError(t, json.Unmarshal(patch, &change))
		for name, value := range change {
			if want[name] = value; string(value) == "null" {
				delete(want, name)
			}
		}
		o := ParseObject(current)
		o.Patch(ParseObject(patch))
		require.Equal(t, len(want), o.Len())
		if o.Len() == 0 {
			require.Nil(t, o.JSON())
			return
		}
		var got map[string]json.RawMessage
		require.NoError(t, json.Unmarshal(o.JSON(), &got))
		require.Equal(t, want, got)
	})
}
