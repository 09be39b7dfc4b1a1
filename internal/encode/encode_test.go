package encode

import (
	"encoding/json"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestJSON(t *testing.T) {
	t.Parallel()
	type user struct {
		Name string `json:"name"`
	}
	var nobody *user
	for name, tc := range map[string]struct {
		in   any
		want string // "": nil
		bad  bool
	}{
		"nil":              {in: nil},
		"nil pointer":      {in: nobody},
		"nil raw":          {in: json.RawMessage(nil)},
		"empty bytes":      {in: []byte{}},
		"raw null":         {in: json.RawMessage(" null ")},
		"raw is compacted": {in: json.RawMessage("{ \"b\" : 1.0,\n\"a\":12345678901234567890 }"), want: `{"b":1.0,"a":12345678901234567890}`},
		"bytes are JSON":   {in: []byte(`[1, 2]`), want: `[1,2]`},
		"struct":           {in: user{Name: "<Ann> & Ötzi"}, want: `{"name":"<Ann> & Ötzi"}`},
		"string":           {in: "x", want: `"x"`},
		"bad string":       {in: "x\xff", want: `"x\ufffd"`},
		"false":            {in: false, want: `false`},
		"map":              {in: map[string]any{"a": json.RawMessage(`{ "x": 1 }`)}, want: `{"a":{"x":1}}`},
		"not JSON":         {in: json.RawMessage(`{"a":`), bad: true},
		"two values":       {in: json.RawMessage(`{} {}`), bad: true},
		"blank":            {in: json.RawMessage("  "), bad: true},
		"not UTF-8":        {in: json.RawMessage("\"\xff\""), bad: true},
		"a channel":        {in: make(chan int), bad: true},
		"not a number":     {in: math.NaN(), bad: true},
	} {
		got, err := JSON(tc.in)
		if tc.bad {
			assert.Error(t, err, name)
			continue
		}
		require.NoError(t, err, name)
		if tc.want == "" {
			assert.Nil(t, got, name)
			continue
		}
		assert.Equal(t, tc.want, string(got), name)
	}

	in := json.RawMessage(`{"a":1}`)
	got, err := JSON(in)
	require.NoError(t, err)
	in[2] = 'z'
	assert.Equal(t, `{"a":1}`, string(got), "in memory of its own")
}
