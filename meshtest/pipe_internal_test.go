package meshtest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestPipeDeadlines(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client, srv := memPipe()
		defer func() { require.NoError(t, errors.Join(client.Close(), srv.Close())) }()
		began := time.Now()
		require.NoError(t, client.SetReadDeadline(began.Add(time.Second)))
		_, err := client.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		var ne net.Error
		require.ErrorAs(t, err, &ne)
		require.True(t, ne.Timeout())
		require.Equal(t, time.Second, time.Since(began))

		// A later deadline does not wake the reader early, and without a deadline it
		// waits.
		require.NoError(t, client.SetDeadline(time.Now().Add(time.Second)))
		require.NoError(t, client.SetDeadline(time.Time{}))
		time.AfterFunc(time.Hour, func() { _, _ = srv.Write([]byte("x")) })
		n, err := client.Read(make([]byte, 1))
		require.NoError(t, err)
		require.Equal(t, 1, n)

		require.NoError(t, client.SetWriteDeadline(time.Now().Add(time.Second)))
		n, err = client.Write(make([]byte, requestLimit+1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.Equal(t, requestLimit, n)
	})
}

func TestPipeClose(t *testing.T) {
	t.Parallel()
	client, srv := memPipe()
	_, err := srv.Write([]byte("bye"))
	require.NoError(t, err)
	require.NoError(t, srv.Close())
	got, err := io.ReadAll(client)
	require.NoError(t, err, "data written before the end arrives, then EOF")
	require.Equal(t, "bye", string(got))
	_, err = client.Write([]byte("x"))
	require.ErrorIs(t, err, syscall.EPIPE)
	_, err = srv.Read(make([]byte, 1))
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = srv.Write([]byte("x"))
	require.ErrorIs(t, err, net.ErrClosed)
	require.NoError(t, client.SetDeadline(time.Now().Add(time.Hour)))
	require.NoError(t, client.Close())
}

func TestPipeAbortLosesUnreadData(t *testing.T) {
	t.Parallel()
	client, srv := memPipe()
	_, err := srv.Write([]byte("lost"))
	require.NoError(t, err)
	srv.abort()
	_, err = client.Read(make([]byte, 4))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	_, err = client.Write([]byte("x"))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.NoError(t, client.Close())
}

func TestPipeLimits(t *testing.T) {
	t.Parallel()
	client, srv := memPipe()
	want := bytes.Repeat([]byte("0123456789"), requestLimit/4)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := client.Write(want); err != nil {
			t.Error(err)
		}
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	got, err := io.ReadAll(srv)
	require.NoError(t, err, "a client that writes much waits for the server")
	wg.Wait()
	require.True(t, bytes.Equal(want, got))

	client, srv = memPipe()
	chunk := make([]byte, 1<<20)
	for range replyLimit >> 20 {
		_, err := srv.Write(chunk)
		require.NoError(t, err)
	}
	_, err = srv.Write(chunk)
	require.ErrorIs(t, err, syscall.ECONNRESET, "a client that reads nothing is cut off")
	_, err = client.Read(chunk)
	require.ErrorIs(t, err, syscall.ECONNRESET)
}
