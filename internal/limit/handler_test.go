package limit

import (
	"bytes"
	"context"
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
)

// appHandler is a handler that calls do first.
type appHandler struct {
	slog.Handler
	do func()
}

func (h appHandler) Handle(ctx context.Context, r slog.Record) error {
	h.do()
	return h.Handler.Handle(ctx, r)
}

func (h appHandler) WithAttrs([]slog.Attr) slog.Handler { h.do(); return nil }

// value panics if it is printed.
type value struct{}

func (value) String() string { panic("again") }

func TestShield(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var s Shield
		var out bytes.Buffer
		do := func() {}
		log := s.Logger(slog.New(appHandler{slog.NewTextHandler(&out, nil), func() { do() }}))
		log.Info("one")
		assert.Contains(t, out.String(), "one", "the line is written when the call returns")
		do = func() { panic(value{}) }
		log.Info("two")
		log.With("a", 1).Info("two")
		do = runtime.Goexit
		log.Info("three")
		assert.Equal(t, ShieldCounts{Panics: 4}, s.Counts())

		release := make(chan struct{})
		do = func() { <-release }
		begun := time.Now()
		log.Info("four")
		assert.Equal(t, LogWait, time.Since(begun))
		for range 100 {
			log.Info("five")
		}
		assert.Equal(t, LogWait, time.Since(begun), "further calls do not wait while one blocks")
		assert.Equal(t, ShieldCounts{Panics: 4, Timeouts: 1, Dropped: 100}, s.Counts(), "Handle is not called if Enabled fails")
		close(release)
		synctest.Wait()
		do = func() {}
		log.Info("six")
		assert.Equal(t, 3, strings.Count(out.String(), "\n"), "one, four, and six")
		assert.False(t, s.Logger(nil).Enabled(t.Context(), slog.LevelError))
	})
}

func TestPanicText(t *testing.T) {
	t.Parallel()
	for want, v := range map[string]any{"text": "text", "5": 5, "a value of type limit.value": value{}, "a value of type *limit.value": &value{}} {
		assert.Equal(t, want, PanicText(v))
	}
	assert.Equal(t, "a value of type []limit.value", PanicText([]value{{}}))
	assert.Equal(t, "a value of type map[string]interface {}", PanicText(map[string]any{"x": value{}}))
	assert.Equal(t, "a value of type *[]limit.value", PanicText(&[]value{{}}))
	defer func() { assert.Contains(t, PanicText(recover()), "index out of range") }()
	var none []int
	_ = none[len(t.Name())]
}
