-- update.lua: changes and refreshes of existing entries.

-- deadline returns the time at which a state with this life ends; '0': never.
local function deadline(left)
  return (left == '0' or left == '') and '0' or string.format('%.0f', now + tonumber(left))
end

-- setState writes or deletes the copy of a state that is for inspection.
local function setState(key, state, left)
  if state == '' then
    call('DEL', key)
  elseif left ~= '0' then
    call('SET', key, state, 'PX', left)
  else
    call('SET', key, state)
  end
end

-- placeTaken returns the connection of a user's kept place that the connection of an op
-- takes, nil if there is none. Then the user had left, and is back.
local function placeTaken(conn, user)
  if user == '' or not users and not cursor then
    return nil
  end
  local seat = seatOf(user)
  if seat and isPlace(seat) and seat ~= '~' .. conn then
    return sub(seat, 2)
  end
  return nil
end

-- update writes the newer parts of an existing entry: metadata, user, state, TTL, grace,
-- and its per-connection key. It returns 0 if it changed the position of the room.
local function update(key, v, mark, conn, entry, ttl, left, mv, metaAttrs, meta, sv, stateAttrs, stateLeft, state, connKey, stateKey)
  local by = mine
  if find(v, entry .. mine, 1, true) ~= 1 then
    local id
    id, by = match(v, '^(%S+)( %S+ )')
    if id ~= entry then
      -- Another entry of the same incarnation is an older one of this connection, which
      -- a late batch brought back after Redis lost the numbers. It has to be replaced.
      -- If it counted as another server's, the connection would lose its place.
      return not id and '! ' .. ODD or (by == mine or by == KEPT) and '0' or 'x' .. sub(by, 1, -2)
    end
    if by == KEPT then
      return '0' -- its owner has to join it again
    end
  end
  local from = #entry + #by + 1
  local _, stop, ttl0, state1, sl, sv0, meta1, mv0, ml, til, joined, s, tail = find(v, REST, from)
  if not stop then
    return '! ' .. ODD
  end
  local metaNew = tonumber(mv) > tonumber(mv0)
  local stateNew = tonumber(sv) > tonumber(sv0)
  local told = '+'
  local who = entry .. by .. ttl .. ' '
  local user0, grace0, extra, data = person(v, stop, tail)
  local user, grace, bytes = user0, grace0, sub(v, stop + 1, data)
  if newUser then
    grace = newGrace
    if tonumber(mv) >= tonumber(mv0) then -- metadata that is not older
      user = newUser
    end
    tail, bytes = bracketed(user, grace, extra), user .. extra
  end
  if metaNew or stateNew or user ~= user0 then
    local err = stand(batch)
    if err then
      return '! ' .. err
    end
    if lacksKeys(user ~= '', user) then
      return again()
    end
    local cut = data + tonumber(ml)
    local meta0, state0 = sub(v, data + 1, cut), sub(v, cut + 1)
    local record
    if metaNew or user ~= user0 then
      local place = placeTaken(conn, user)
      advance(mark)
      told, s = 0, seq
      if metaNew then
        meta0, mv0, meta1 = meta, mv, metaAttrs
      end
      record = who .. state1 .. meta1 .. til .. ' ' .. joined .. ' ' .. s .. tail .. '\n' .. bytes .. meta0 .. state0
      setUser(conn, user0, false, user, false)
      publish('M', '.' .. (place or '') .. figures(user, place and 1), conn, record)
      if place then
        vacate(place, mark .. '-', 'p')
      end
    end
    if stateNew then
      local tell = state0 ~= '' or state ~= ''
      if tell then
        advance(mark .. '+')
        told, s, til = 0, seq, deadline(stateLeft)
        setState(stateKey, state, stateLeft)
      end
      local since = til .. ' ' .. joined .. ' ' .. s .. tail .. '\n' .. bytes
      record = who .. stateAttrs .. meta1 .. since .. meta0 .. state
      if tell then
        publish('S', '.' .. figures(user), conn, meta0 == '' and record or who .. stateAttrs .. mv0 .. ' 0 ' .. since .. state)
      end
    end
    call('HSET', key, conn, record)
  elseif grace ~= grace0 then
    call('HSET', key, conn, who .. state1 .. meta1 .. til .. ' ' .. joined .. ' ' .. s .. tail .. '\n' .. bytes .. sub(v, data + 1))
  elseif ttl ~= ttl0 then
    call('HSET', key, conn, who .. sub(v, from + #ttl0 + 1))
  end
  if state ~= '' and sv == sv0 and sv ~= '0' and call('EXISTS', stateKey) == 0 then
    setState(stateKey, state, stateLeft) -- the copy was lost
  end
  if ttl == '0' then
    if left ~= '0' or ttl0 ~= '0' then
      call('DEL', connKey)
    end
  elseif left ~= '0' then
    call('SET', connKey, entry, 'PX', left)
  end
  return told
end

-- modify executes S, M and U.
local function modify(mark, conn, entry, ttl, left, mv, metaAttrs, meta, sv, stateAttrs, stateLeft, state)
  if waits == members then
    return 'k'
  end
  local v, out = read(members, conn)
  if not v then
    return out
  end
  local more
  if full then
    -- A refresh needs no additional memory. If it were refused, every entry with a TTL
    -- would expire. Only the rest of the op is refused, if it is newer than the record.
    -- An entry that is only verified brings nothing new.
    local sv0, mv0 = match(v, '^%S+ %S+ %d+ %d+ (%d+) %S (%d+) ')
    more = sv0 and (tonumber(mv) > tonumber(mv0) or tonumber(sv) > tonumber(sv0))
    mv, sv = '0', '0'
    if newUser then
      local user = memberOf(v)
      more = more or user ~= newUser
      newUser = nil
    end
  end
  out = update(members, v, mark, conn, entry, ttl, left, mv, metaAttrs, meta, sv, stateAttrs, stateLeft, state,
    keys[ki], keys[ki + 1])
  if more and out == '+' then
    return '! ' .. full
  end
  return out
end

local function refresh(name, key, conn, entry, left)
  if waits == key then
    return 'k'
  end
  local v, out = read(key, conn)
  if not v then
    return out
  end
  local ttl = sub(name, 2)
  if ttl ~= '0' and find(v, entry .. mine .. ttl .. ' ', 1, true) == 1 then
    if call('PEXPIRE', keys[ki + 1], left) == 0 then
      call('SET', keys[ki + 1], entry, 'PX', left)
    end
    return '+'
  end
  return update(key, v, '', conn, entry, ttl, left, '0', '', '', '0', '', '0', '', keys[ki + 1])
end
