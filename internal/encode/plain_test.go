package encode

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

type zeroer struct{ N int }

func (*zeroer) IsZero() bool { panic("IsZero was called") }

// A field is not plain if encoding/json calls the app's IsZero for it.
func TestPlainFields(t *testing.T) {
	t.Parallel()
	assert.False(t, isPlain(struct {
		Z zeroer `json:",omitzero"`
	}{}))
	assert.False(t, isPlain(struct {
		Z *zeroer `json:",omitzero"`
	}{&zeroer{}}))
	assert.True(t, isPlain(struct {
		Z zeroer
		T time.Time `json:",omitzero"`
	}{}))
}
